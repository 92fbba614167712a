"""Tests on a machine of their own: a guest with a kernel that has cgroup v2, whatever this machine has. `make
test-guest` runs them, the usual suite does not."""
