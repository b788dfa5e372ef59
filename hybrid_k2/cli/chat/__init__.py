"""The command `chat`: `command` holds its options, `session` the interactive chat, `one_shot` the single answer."""
