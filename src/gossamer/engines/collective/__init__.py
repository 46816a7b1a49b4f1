"""Exchange of tensors by torch's collectives. The only place that imports torch.distributed."""
