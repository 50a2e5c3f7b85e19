"""A package over HTTP, in OpenAI's wire format: what `edgeprompt serve` runs. Needs the extra `serve`."""
