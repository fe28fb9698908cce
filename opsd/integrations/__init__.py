"""Other people's trainers with this project's loss and packed rows, each in a module called after its package."""
