"""Reading rows of files and recognising what their columns hold."""
