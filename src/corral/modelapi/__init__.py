"""What model APIs say, read strictly and within bounds: for brokers as it comes, for the log as it was kept."""
