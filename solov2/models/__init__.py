"""The network and its post-processing; constructors take plain arguments, never a configuration."""
