"""What training adds to the encoders: plain functions, around torch's own tools and peft's."""
