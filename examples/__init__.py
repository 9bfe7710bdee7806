"""Programs to read and to copy, and the data that they share with the lessons and the benchmarks."""
