"""x86 sandbox in two tiers under KVM's emulation-failure contract."""
