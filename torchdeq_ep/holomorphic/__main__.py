"""Prints the table of rules: `python -m torchdeq_ep.holomorphic > docs/holomorphic-rules.md`."""

import sys

from torchdeq_ep.holomorphic import rules_table

sys.stdout.write(rules_table())
