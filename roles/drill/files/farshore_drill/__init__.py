"""What a drill found, measured: the users' history, the two trees, the capture, and the report made of them."""
