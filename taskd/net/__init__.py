"""World 1, the other nodes: TLS connections, the mesh of peers, discovery by mDNS."""
