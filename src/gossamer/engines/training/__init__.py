"""What happens inside a process that trains: batches, local steps, blocks of participants; the same on every engine."""
