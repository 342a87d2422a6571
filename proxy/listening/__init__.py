"""Where clients connect: sockets, TLS handshakes, connections, and the routes of their streams."""
