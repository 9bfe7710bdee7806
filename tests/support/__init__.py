"""What the tests share: array libraries, strategies, comparison."""
