"""Processes of ours: children that never outlive us, what memory they take, and servers that go on when we end. Start
reading in ``children.py``; ``child.py`` is the other end of its pipe."""
