"""What holds for all tests."""

from hypothesis import settings

# How long an example takes says nothing on a machine that is busy: speed belongs to the benchmarks.
settings.register_profile("taskd", deadline=None)
settings.load_profile("taskd")
