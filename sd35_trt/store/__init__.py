"""Where stages and models are kept between builds."""
