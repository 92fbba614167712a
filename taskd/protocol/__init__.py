"""What nodes say to each other: messages, frames, and one connection's life. Pure: no I/O, no clock."""
