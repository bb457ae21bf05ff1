"""Storage: repositories of git on disk, and large files beside them; knows no HTTP."""
