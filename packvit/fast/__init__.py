"""What makes an encoder fast and changes none of its numbers beyond rounding."""
