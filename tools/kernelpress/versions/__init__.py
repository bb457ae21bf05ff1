"""Operations on versions that are on a Hub: list, bundle, yank, redirect and roll back."""
