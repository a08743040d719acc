"""The app in the browser: a window on run folders. Floor 8."""
