"""What the processes of one job do once for all of them."""
