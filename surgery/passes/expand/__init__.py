"""The three ways in which `expand` makes a program larger: deeper, wider, and with branches at its sites."""
