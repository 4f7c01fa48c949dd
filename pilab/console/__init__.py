"""What the serial console says: printk lines and crashes."""
