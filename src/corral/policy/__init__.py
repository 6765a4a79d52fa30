"""What a person wrote: the policy. ``model`` holds the values, ``load`` reads YAML."""
