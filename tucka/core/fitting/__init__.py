"""Tucker experts nearest to given matrices."""
