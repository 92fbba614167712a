"""The shell: the only package that joins the core and the four worlds."""
