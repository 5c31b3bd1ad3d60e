"""The door's checks, one file per thing that is looked at. Each raises `Refusal` for what cannot work and returns warnings,
one sentence each, for what may be meant otherwise. None creates anything."""
