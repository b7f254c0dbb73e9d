"""A server that speaks OpenAI's protocol, for one machine: `specbranch serve`."""
