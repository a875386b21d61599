"""Where Hugging Face's words live: the `Cache`, its layers, the attention functions, forwards."""
