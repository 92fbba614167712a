"""Settings: defaults < /etc/taskd/taskd.toml < TASKD_* < flags. Every key, its type, its default and its bounds."""
