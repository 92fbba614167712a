"""The command line: one small function a command, talking HTTP over the Unix socket."""
