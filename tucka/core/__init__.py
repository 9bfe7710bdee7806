"""The mathematics of Tucker experts on any TensorLy backend; one file for each idea of the paper."""
