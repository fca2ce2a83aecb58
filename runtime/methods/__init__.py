"""Programs and their methods: delegates, what runs outside them, and captured steps."""
