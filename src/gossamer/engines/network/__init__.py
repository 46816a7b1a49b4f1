"""Training by clients that dial a server: processes on this machine, or machines that keep their data to themselves."""
