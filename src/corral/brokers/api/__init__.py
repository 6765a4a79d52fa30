"""The API broker: services that an OpenAPI document describes, operation by operation."""
