"""What the programs of `scripts/` share. None of these modules is a program, and none imports one."""
