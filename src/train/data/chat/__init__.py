"""From conversations to tokens, with exact masks."""
