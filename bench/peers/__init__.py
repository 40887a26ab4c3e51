"""The same losses computed in other ways, to be timed beside ours; each is tested for right numbers first."""
