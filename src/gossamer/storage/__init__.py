"""What a run keeps on disk: logs, commits, private state of clients."""
