"""What this is a version of: in a module of its own, for those who may not import the package's face."""

VERSION = "0.1.0"
