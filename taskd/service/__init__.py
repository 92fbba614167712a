"""taskd as a service of systemd: its units, and how they come onto a machine."""
