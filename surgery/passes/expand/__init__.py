"""The three ways in which `expand` enlarges a program: deeper, wider, and with side branches."""
