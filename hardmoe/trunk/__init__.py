"""The trunk: the network whose features decide the partition."""
