"""Network block devices: the protocol, a server and a client."""
