"""The testbed: a small open_clip base, its experts, the tasks they were made for and the script that made them."""
