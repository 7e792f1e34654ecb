"""The same tokens at fixed addresses, for decode steps captured as CUDA graphs."""
