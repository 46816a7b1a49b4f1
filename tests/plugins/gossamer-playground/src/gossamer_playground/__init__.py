"""A workload, a data set and a model for gossamer."""
