"""Tests of taskd.daemon."""
