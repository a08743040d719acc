"""Many runs from one file: planned, carried out, recorded and compared. Floor 7."""
