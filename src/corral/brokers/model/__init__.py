"""The broker of models: OpenAI Chat Completions and Responses, Anthropic Messages. See docs/brokers.md."""
