"""The bodies of requests and responses, after the OpenAI API and vLLM's extra fields."""
